"""``mq serve``: an HTTP server in the words of OpenAI's interface, for trying checkpoints."""
