"""Sources of images, one file each: `open_corpus(rest_of_spec) -> Corpus`."""
