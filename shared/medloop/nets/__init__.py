"""Networks in torch: architectures by id, the served network around them, and their way into a bundle and back."""

from medloop.nets.architectures import Architecture, Classifier, build
from medloop.nets.export import TrainingImages, export_bundle
from medloop.nets.network import ServedNetwork, rebuild

__all__ = ["Architecture", "Classifier", "ServedNetwork", "TrainingImages", "build", "export_bundle", "rebuild"]
