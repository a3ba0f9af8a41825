"""The page of ``vivace ui``: three views of one running server, on this machine alone."""
