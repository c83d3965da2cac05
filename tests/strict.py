"""The run-time check of annotations. As everywhere in Python typing, an int will do where a float is asked
for."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
