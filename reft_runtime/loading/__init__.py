"""Makes a base model ready: loads it, replaces its layers, and checks it by packed steps."""
