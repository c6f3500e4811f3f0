"""Sources of models, one file each: `load_encoder(rest_of_spec) -> Encoder`."""
