"""Images and prompts to other prompts."""
