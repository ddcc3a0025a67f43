"""Control tokens and chat templates: patching, rendering, and checks that training and serving agree."""
