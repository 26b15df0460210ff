"""What this computer gives: cores, memory, places to write."""
