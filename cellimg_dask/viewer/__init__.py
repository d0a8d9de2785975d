"""Looking at images: neuroglancer, painting, landmarks and surfaces, on top of the server."""
