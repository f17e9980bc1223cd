"""Pictures drawn with an adapter: what to draw, each concept in its place, and the files that pictures are kept in."""
