"""Several servers behind one address, on Ray Serve: fronts that route, replicas that answer."""
