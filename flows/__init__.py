"""What runs, and in which order. Flows are started by Prefect or by the command line; they hold no rules."""
