"""Where keys and values lie, and attention over them."""
