"""What every part stands on: errors that a user can mend, files that are written whole, the frame of a program."""
