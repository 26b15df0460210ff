"""Other libraries' files of edits: recognised, read, and where it makes sense written."""
