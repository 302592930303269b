"""From logits to tokens: what a request asks of them, on the host and on the device."""
