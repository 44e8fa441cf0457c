from rft.predict.model import Model as Model
from rft.predict.model import Prediction as Prediction
from rft.predict.model import load as load

__version__: str
