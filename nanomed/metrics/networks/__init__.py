"""The feature networks that metrics look through, with the names of their published files. May import `weights`."""
