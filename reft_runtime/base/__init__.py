"""The frozen base model: found, loaded, refused, made fast."""
