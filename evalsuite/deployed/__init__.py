"""A detector to deploy: one folder of an encoder, a fitted detector and a threshold, which loads without this project."""
