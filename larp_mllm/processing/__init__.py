"""Text, videos and conversations <-> ids."""
