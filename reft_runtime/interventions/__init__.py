"""What an intervention is: its maths, its file, its positions, the registry of names and versions."""
