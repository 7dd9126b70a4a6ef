"""From a bundle and images to findings."""
