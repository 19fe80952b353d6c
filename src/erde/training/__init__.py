"""The one training loop: networks, losses, teachers and several processes."""
