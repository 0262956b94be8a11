"""What a run says of itself: metrics, progress, samples, and the page that shows them."""
