"""How a layer reaches the keys that are not on the device."""
