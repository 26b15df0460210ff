"""An intervention: its maths, its manifest and its file."""
