"""Reading, storing, planning and packing question-passage pairs."""
