"""From a corpus and an encoder to a sealed store."""
