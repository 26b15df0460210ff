"""The registry: names, versions, the requests that hold them, and where they come from."""
