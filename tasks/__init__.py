"""The only code that touches the world: one module for each outside thing."""
