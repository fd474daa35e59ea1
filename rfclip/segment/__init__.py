"""From a picture and class names to a segmentation."""
