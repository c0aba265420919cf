"""From an image to its views: crops, colors, mixup, and the geometry of UDI."""
