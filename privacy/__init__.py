"""The pure core: mechanisms, accounting, fixed point, secure sum. No disk, no network, no Flower."""
