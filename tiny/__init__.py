"""The tiny world: drawn images, small towers and an exam, so that everything runs on a laptop."""
