"""Several processes: how they are launched, what they exchange, and how networks are spread over them."""
