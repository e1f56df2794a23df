"""Model definitions: one configuration record, one decoder, and families that are names and switches."""
