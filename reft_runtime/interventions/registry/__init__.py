"""Names, versions, who holds them, and where they come from."""
