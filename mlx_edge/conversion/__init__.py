"""From a model of any source and format to a folder that maps: plan, shards, card and receipt."""
