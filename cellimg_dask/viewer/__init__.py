"""Looking at images: a server that any reader of OME-Zarr understands, and a viewer on it."""
