"""Time and memory of the loss and of OPIS, beside those of others; `make bench` and `make gpu`."""
