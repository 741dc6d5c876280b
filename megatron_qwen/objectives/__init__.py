"""What a batch is trained for: from hidden states and the output layer to a loss. One file per objective."""
