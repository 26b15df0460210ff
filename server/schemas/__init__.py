"""Request bodies, validated completely before anything reaches the engine."""
