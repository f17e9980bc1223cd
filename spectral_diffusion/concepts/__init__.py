"""The concept that a user brings: its photos, captions and masks, read and checked."""
