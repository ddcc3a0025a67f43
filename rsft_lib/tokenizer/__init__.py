"""Control tokens and chat templates: patch them, render conversations with them, and check both against serving."""
