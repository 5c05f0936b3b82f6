"""Raw files to prepared rows, text to token ids, images to pixels. Never imports torch."""
