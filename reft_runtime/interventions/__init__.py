"""What an intervention is: its maths, its file, its positions, and the registry of versions."""
