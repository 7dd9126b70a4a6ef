"""A trained model on disk, and the registry that names the champion."""
