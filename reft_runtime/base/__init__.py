"""The frozen base model: how it is found, loaded, refused and made fast."""
