"""The networks that write, with the names of their published files, and how images are cut for those that look.
May import `text`, `weights`, and of `captions` beam search."""
