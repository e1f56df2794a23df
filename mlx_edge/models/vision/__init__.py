"""Images as part of a prompt: read, cut in patches, seen by a tower, placed among tokens."""
