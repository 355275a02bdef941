"""One file a model family: module names of each trainer against those of diffusers, and its configuration."""
