"""A DeepSeek and a Postgres on this machine. It is the provider: it imports nothing of the product."""
