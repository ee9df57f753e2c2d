"""A registration on the disk: where its files lie and whose they are, reading it again, mapping points and images."""
